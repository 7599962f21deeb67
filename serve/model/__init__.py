"""The frozen base model: loading, adaptable sites, the attention seam."""
