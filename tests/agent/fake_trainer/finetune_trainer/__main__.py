import sys

from finetune_trainer.warm import main

sys.exit(main())
