"""Files of DeepSpeed's engines: how they are written, and read by ranks laid out otherwise."""
