"""Knowledge about language models that needs no torch: sizes, tensor names and shapes, and how
Megatron's parameters are made of Hugging Face tensors.
"""
