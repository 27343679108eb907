"""Commands: `python -m lightning_peft plan …`."""

from lightning_peft.planner.cli import main

raise SystemExit(main())
