CREATE TYPE order_status AS ENUM ('placed', 'shipped');

CREATE TABLE stock (
    sku text PRIMARY KEY,
    pieces int NOT NULL CHECK (pieces >= 0)
);

-- Without a unique key on `request`, so that a doubled order shows.
CREATE TABLE orders (
    id bigserial PRIMARY KEY,
    request bigint NOT NULL,
    sku text NOT NULL REFERENCES stock,
    status order_status NOT NULL DEFAULT 'placed'
);
