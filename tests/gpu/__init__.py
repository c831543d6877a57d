"""What only a GPU proves, in parts: scripts/accept_gpu.py runs them one by one, ``pytest -m gpu`` as tests."""
