"""What every layer may use: argument checks, atomic files, the version, private names of other packages."""
