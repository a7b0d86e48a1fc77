"""The flags that name a text and say how it is read, for every command that reads one."""


def add_text_flags(parser, required=False):
    """Give a parser, or a group of its flags, --data, --text-field, --data-name and --block-size."""
    parser.add_argument(
        "--data",
        nargs="+",
        required=required,
        metavar="DATA",
        help="files (text, .jsonl, .parquet, .gz), folders of them, or data sets of the Hub. Required.",
    )
    parser.add_argument("--text-field", metavar="NAME", help="the field or column that holds the text. Default: text.")
    parser.add_argument("--data-name", metavar="NAME", help="the configuration of a data set")
    parser.add_argument(
        "--block-size", type=int, metavar="N", help="tokens in a row. Default: the model's, up to 2048."
    )
