"""The command line: `noisekd COMMAND`, a thin cover of the package's functions.

Python imports a package before what is in it, and `hf_noisekd` imports torch, timm and transformers, which takes
seconds. Help and misspelt options are to take no time, so `noisekd.py` loads this folder without the package,
and what is in it imports its neighbours relatively, and the package only where a command runs. The one exception is
`distill`, whose options are those of a configuration class.

Every command takes `--config FILE`, a YAML mapping from options to values, which are put before those of the command
line and read as if they had been typed. Exit codes: 0 for success; 1 if the run failed, and from `info` if the model
cannot be a teacher; 2 for wrong usage, such as a value out of range, a bad file or an output folder that is in use; 130
after Ctrl-C and 143 after SIGTERM, as a shell has it.
"""
