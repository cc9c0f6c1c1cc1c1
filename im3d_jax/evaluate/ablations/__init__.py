"""The paper's ablations against truth (`im3d evaluate ablations`): Tables 2, 3 and 4, Fig. 4 and 6.

`tables` has the rows as data, `rows` makes configs of them, `measuring` makes their assets and scores them,
`reporting` says what the numbers show, `drawing` draws them.
"""
