"""Profiles, plans, Ray actors, the model store, the `headrace` command. Alone imports Ray."""
