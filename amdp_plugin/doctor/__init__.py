"""``amdp doctor``: what is installed, and which of the plugin's hooks apply to it."""
