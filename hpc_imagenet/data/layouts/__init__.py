"""Layouts of labelled images: which file belongs to which class and split, by names and lists."""
