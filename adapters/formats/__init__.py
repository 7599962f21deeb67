"""File formats: each family compiles its files to an AdapterProgram, behind one register.

To add a family, write ``formats/<family>.py`` with a compiler under ``@register("PEFT_TYPE")`` and import it here.
"""

from onebase.adapters.formats import lora as lora
from onebase.adapters.formats.register import compile_folder, families, register

__all__ = ["compile_folder", "families", "register"]
