"""The command line's options, each defined once: flag, type, help and the heading it stands under.

A module for each heading. They know names and help texts; they know nothing of what a value leads
to. Every option is also an EPSERVE_ variable and a key of a --config file, without doing anything
for it: see epserve.settings_command. Those that are `is_eager` are not: they are about the others.
"""
