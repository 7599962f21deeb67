"""File formats: each family compiles its files to an AdapterProgram, behind one register.

To add a family, write ``formats/peft/<family>.py`` with a compiler under ``@register("PEFT_TYPE", ...)``: every module
below this folder is imported.
"""

import importlib
import pkgutil

from onebase.adapters.formats.register import compile_folder, families, register

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = ["compile_folder", "families", "register"]
