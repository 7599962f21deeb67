"""File format -> AdapterProgram: a module per family behind one register."""
