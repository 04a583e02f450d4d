#!/bin/sh
# The end of each image, once the sources are in it: the command, compiled sources, a last check
# that it is an image for ACCELERATOR.
set -eu

# The command `finetune-job`; pip, which would write it, is gone.
printf '%s\n' '#!/opt/venv/bin/python' 'from job.__main__ import main' 'main()' > /opt/venv/bin/finetune-job
chmod 755 /opt/venv/bin/finetune-job
# Nobody can write beside the sources later on.
/opt/venv/bin/python -m compileall -q /opt/finetune/job
/opt/venv/bin/python containers/check.py image "$ACCELERATOR"
