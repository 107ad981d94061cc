"""Model code that is copied into every `sdar` export; runs with torch and transformers alone."""
