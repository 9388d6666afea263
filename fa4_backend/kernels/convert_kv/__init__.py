"""K and V of a step's long rows from FP8 pages to 16 bits without pages, once a call: a family of kernels."""
