"""Weights in and out: official files, this project's checkpoints, Hugging Face style folders.

torch_file.py .pth and .ckpt | contents.py what a path holds | kinds.py which model it is and what it must have |
text_model.py, umt5.py configurations and names | official.py, native.py, hf_folder.py writing |
convert.py one conversion | compare.py reports and differences | command.py, inspect_command.py the commands
"""
