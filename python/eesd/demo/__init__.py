"""The embedded demo model: its corpus, its training and its on-policy text.

`corpus` builds token files and a tokenizer, `train` trains the backbone from them, `selfgen`
lets the backbone write the text that its exit layers are distilled on. The trained files lie in
`model/`. Each module runs alone (`python -m eesd.demo.train --help`) and imports no other.
"""
