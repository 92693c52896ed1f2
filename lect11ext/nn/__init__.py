"""Modules, as torch.nn holds torch's."""
