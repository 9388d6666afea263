"""Adapters between serving engines and `fa4_backend`: they translate names and hold no maths.

Installed as the package `fa4_integration`. An engine is imported by its own adapter only, when that engine asks for it.
"""
