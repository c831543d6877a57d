"""MSD (arXiv 2410.23274): multi-student distillation."""
