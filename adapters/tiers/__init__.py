"""Where compiled adapters are, on their way from the disk to host memory and the device, and who has to go."""
