"""What makes the files of this repository; not installed."""
