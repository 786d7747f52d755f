from tornjango.cli import main

main()
