"""How each kind of PEFT's folders says what a method of ours says."""
