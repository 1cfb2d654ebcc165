"""A local web page to look into a store: its samples, what influences what, and how the run is doing.

``logix-like serve STORE`` starts it. It listens on 127.0.0.1 unless told otherwise, answers only who has its token and
asks it by its own name, and takes nothing from an address but the keys of samples.
"""
