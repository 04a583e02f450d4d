"""LoRA layers of the families, and which modules they adapt."""
