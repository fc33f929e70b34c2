"""Tasks of lmms-eval on generated data; `eval/lmms_tasks.py` writes them with their data into a folder."""
