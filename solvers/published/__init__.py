"""Placement methods from papers and serving engines, one file each, written anew."""
