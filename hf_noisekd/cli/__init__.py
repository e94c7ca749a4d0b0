"""The command line: `noisekd COMMAND`, a thin cover of the package's functions.

`noisekd.py` beside the package loads this folder without the package, so that help and misspelt options are answered at
once. Therefore what is in it imports its neighbours relatively, and the package only where a command runs. The one
exception is `distill`, whose options are those of a configuration class.

Every command takes `--config FILE`, a YAML mapping from option names to values. Its entries are put before the options
of the command line and read as if they had been typed: options go over the file, and the file over the defaults.

Exit codes: 0 for success; 1 if the run failed, and from `info` if the model cannot be a teacher; 2 for wrong usage: an
unknown option, a value out of range, a bad configuration file, an output folder that is in use.
"""
