"""A sample for the eye: glyphs of tokens, what a position keeps, measures; numpy alone.

Reading order: glyphs -> entries -> measures -> notebook.
"""
