"""The three dispatch models of the design, as programs that ranks run together."""
