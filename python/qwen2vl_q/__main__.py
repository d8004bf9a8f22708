import sys

from qwen2vl_q.cli.main import main

sys.exit(main())
