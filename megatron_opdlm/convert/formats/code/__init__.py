"""Model code that is copied into `sdar` and `a2d` exports; runs with torch and transformers alone.

The files are the same in every export, whatever its family or format: transformers keeps the code
of directories of one name in one cache, where two exports may then share it.
"""
