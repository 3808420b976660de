"""Parts with tensors in and tensors out; none of them knows a modality or an objective."""
