"""Files and folders. Reading gives clear errors; writing is complete or has no effect."""
