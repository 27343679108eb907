"""The surgery, in place on any `nn.Module`: attach, activate, merge, combine and detach."""
