"""Recipes of commands that are run once each."""
