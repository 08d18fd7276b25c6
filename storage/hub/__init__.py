"""The store of datasets on the Hugging Face hub (`hf://datasets/...`), for inputs only."""
