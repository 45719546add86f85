"""Hugging Face folders: what their config.json means, which of their tensors is which of ours, in and out."""
