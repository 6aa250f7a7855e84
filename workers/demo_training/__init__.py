"""How the demo model of warmroute was made: text, training, packing. Start with README.md."""
