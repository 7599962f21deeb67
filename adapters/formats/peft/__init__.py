"""The families of Hugging Face PEFT, a module each; LORA has several."""
