"""Boards: several run folders, made by different people on different machines, on one page."""
