"""File formats: each family compiles its files to an AdapterProgram, behind one register.

To add a family, write ``formats/<family>.py`` with a compiler under ``@register("PEFT_TYPE", ...)``: every module of
this folder is imported.
"""

import importlib
import pkgutil

from onebase.adapters.formats.register import compile_folder, families, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["compile_folder", "families", "register"]
