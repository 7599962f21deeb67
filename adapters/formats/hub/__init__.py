"""The families of AdapterHub's adapters library."""
