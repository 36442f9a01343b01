"""Every layout against one process."""
