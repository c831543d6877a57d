"""Methods: one file each, or one folder where a method needs several. Each registers itself when it is imported."""
