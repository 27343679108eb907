"""Commands: `python -m lightning_peft plan …`."""

from lightning_peft.planner.command import main

raise SystemExit(main())
