-- Tables of the library.

CREATE TABLE readers (
    id          INTEGER PRIMARY KEY,
    name        TEXT NOT NULL,
    mail        TEXT NOT NULL UNIQUE,
    joined      DATE NOT NULL
);

CREATE TABLE books (
    id          INTEGER PRIMARY KEY,
    title       TEXT NOT NULL,
    author      TEXT NOT NULL,
    year        INTEGER,
    shelf       TEXT NOT NULL
);

CREATE TABLE copies (
    id          INTEGER PRIMARY KEY,
    book_id     INTEGER NOT NULL REFERENCES books (id),
    bought      DATE NOT NULL,
    condition   TEXT NOT NULL DEFAULT 'good'
);

CREATE TABLE loans (
    id          INTEGER PRIMARY KEY,
    copy_id     INTEGER NOT NULL REFERENCES copies (id),
    reader_id   INTEGER NOT NULL REFERENCES readers (id),
    lent        DATE NOT NULL,
    due         DATE NOT NULL,
    returned    DATE
);

CREATE INDEX loans_by_reader ON loans (reader_id);
CREATE INDEX loans_by_copy ON loans (copy_id);

CREATE VIEW overdue AS
SELECT readers.name, readers.mail, books.title, loans.due
FROM loans
JOIN readers ON readers.id = loans.reader_id
JOIN copies ON copies.id = loans.copy_id
JOIN books ON books.id = copies.book_id
WHERE loans.returned IS NULL
  AND loans.due < CURRENT_DATE
ORDER BY loans.due;
