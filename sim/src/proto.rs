//! The server's side of the wire protocol: reads messages, and writes answers.

use crate::sql::SqlError;

/// What the first message of a connection asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum First {
    /// TLS or GSS encryption.
    Encryption,
    Cancel {
        pid: i32,
        secret: i32,
    },
    Session,
}

/// Takes the first message out of the buffer, if it is whole.
pub(crate) fn first(buffer: &mut Vec<u8>) -> Option<First> {
    let body = take(buffer, 0)?;
    let number = |at: usize| Some(i32::from_be_bytes(body.get(at..at + 4)?.try_into().ok()?));
    match number(0)? {
        80_877_103 | 80_877_104 => Some(First::Encryption),
        80_877_102 => Some(First::Cancel { pid: number(4)?, secret: number(8)? }),
        _ => Some(First::Session),
    }
}

/// A message of an open session.
#[derive(Debug)]
pub(crate) enum Request {
    Query(String),
    Parse { name: String, sql: String },
    Describe { portal: bool, name: String },
    Bind { statement: String, values: Vec<Option<Vec<u8>>> },
    Execute,
    Close { name: String },
    Sync,
    Terminate,
    Other,
}

/// Takes the next message out of the buffer, if it is whole.
pub(crate) fn next(buffer: &mut Vec<u8>) -> Option<Request> {
    let tag = *buffer.first()?;
    let body = take(buffer, 1)?;
    let mut reader = Reader(&body);
    Some(match tag {
        b'Q' => Request::Query(reader.text()),
        b'P' => Request::Parse { name: reader.text(), sql: reader.text() },
        b'D' => Request::Describe { portal: reader.byte() == b'P', name: reader.text() },
        b'B' => {
            let (_, statement) = (reader.text(), reader.text());
            for _ in 0..reader.short() {
                reader.short();
            }
            let values = (0..reader.short()).map(|_| reader.value()).collect();
            Request::Bind { statement, values }
        }
        b'E' => Request::Execute,
        b'C' => {
            reader.byte();
            Request::Close { name: reader.text() }
        }
        b'S' => Request::Sync,
        b'X' => Request::Terminate,
        _ => Request::Other,
    })
}

/// Takes a message whose length is behind `tag` bytes. Returns what follows the length.
fn take(buffer: &mut Vec<u8>, tag: usize) -> Option<Vec<u8>> {
    let length = u32::from_be_bytes(buffer.get(tag..tag + 4)?.try_into().ok()?);
    let end = tag + usize::try_from(length).ok()?;
    let body = buffer.get(tag + 4..end)?.to_vec();
    buffer.drain(..end);
    Some(body)
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn bytes(&mut self, count: usize) -> &[u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    fn short(&mut self) -> u16 {
        self.bytes(2).try_into().map_or(0, u16::from_be_bytes)
    }

    fn text(&mut self) -> String {
        let length = self.0.iter().position(|byte| *byte == 0).unwrap_or(self.0.len());
        let text = String::from_utf8_lossy(self.bytes(length)).into_owned();
        self.byte();
        text
    }

    fn value(&mut self) -> Option<Vec<u8>> {
        let length = self.bytes(4).try_into().map_or(-1, i32::from_be_bytes);
        let length = usize::try_from(length).ok()?;
        Some(self.bytes(length).to_vec())
    }
}

/// An answer that grows.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) bytes: Vec<u8>,
    /// The statement waits for the synchronous standby. Its transaction is committed already.
    pub(crate) waits: bool,
}

impl Answer {
    fn message(&mut self, tag: u8, body: impl FnOnce(&mut Vec<u8>)) {
        self.bytes.push(tag);
        let at = self.bytes.len();
        self.bytes.extend([0; 4]);
        body(&mut self.bytes);
        let length = u32::try_from(self.bytes.len() - at).unwrap_or(u32::MAX);
        if let Some(place) = self.bytes.get_mut(at..at + 4) {
            place.copy_from_slice(&length.to_be_bytes());
        }
    }

    fn empty(&mut self, tag: u8) {
        self.message(tag, |_| ());
    }

    pub(crate) fn authenticated(&mut self) {
        self.message(b'R', |body| body.extend(0_u32.to_be_bytes()));
    }

    pub(crate) fn parameter(&mut self, name: &str, value: &str) {
        self.message(b'S', |body| {
            text(body, name);
            text(body, value);
        });
    }

    pub(crate) fn key(&mut self, pid: i32, secret: i32) {
        self.message(b'K', |body| {
            body.extend(pid.to_be_bytes());
            body.extend(secret.to_be_bytes());
        });
    }

    /// `status`: `I`, `T` or `E`.
    pub(crate) fn ready(&mut self, status: u8) {
        self.message(b'Z', |body| body.push(status));
    }

    pub(crate) fn complete(&mut self, tag: &str) {
        self.message(b'C', |body| text(body, tag));
    }

    pub(crate) fn no_query(&mut self) {
        self.empty(b'I');
    }

    pub(crate) fn parsed(&mut self) {
        self.empty(b'1');
    }

    pub(crate) fn bound(&mut self) {
        self.empty(b'2');
    }

    pub(crate) fn closed(&mut self) {
        self.empty(b'3');
    }

    pub(crate) fn no_data(&mut self) {
        self.empty(b'n');
    }

    /// The parameters of a statement, all of type `bigint`.
    pub(crate) fn parameters(&mut self, count: u16) {
        self.message(b't', |body| {
            body.extend(count.to_be_bytes());
            (0..count).for_each(|_| body.extend(20_u32.to_be_bytes()));
        });
    }

    /// The columns of a result, all of this type.
    pub(crate) fn columns(&mut self, count: usize, oid: u32) {
        self.message(b'T', |body| {
            body.extend(short(count).to_be_bytes());
            for _ in 0..count {
                text(body, "column");
                body.extend(0_u32.to_be_bytes());
                body.extend(0_u16.to_be_bytes());
                body.extend(oid.to_be_bytes());
                body.extend((-1_i16).to_be_bytes());
                body.extend((-1_i32).to_be_bytes());
                body.extend(0_u16.to_be_bytes());
            }
        });
    }

    pub(crate) fn row(&mut self, values: &[Option<String>]) {
        self.message(b'D', |body| {
            body.extend(short(values.len()).to_be_bytes());
            for value in values {
                match value {
                    None => body.extend((-1_i32).to_be_bytes()),
                    Some(value) => {
                        body.extend(u32::try_from(value.len()).unwrap_or(0).to_be_bytes());
                        body.extend(value.as_bytes());
                    }
                }
            }
        });
    }

    pub(crate) fn error(&mut self, severity: &str, error: &SqlError) {
        self.report(b'E', severity, error);
    }

    pub(crate) fn notification(&mut self, pid: i32, payload: &str) {
        self.message(b'A', |body| {
            body.extend(pid.to_be_bytes());
            text(body, "calls");
            text(body, payload);
        });
    }

    /// Something that is no message.
    pub(crate) fn garbage(&mut self) {
        self.empty(b'!');
    }

    pub(crate) fn notice(&mut self, error: &SqlError) {
        self.report(b'N', "WARNING", error);
    }

    /// The last words of a session that an administrator ends. While it waits in COMMIT, PostgreSQL says this in a
    /// warning, and nothing after it (`SyncRepWaitForLSN` in `syncrep.c`).
    pub(crate) fn terminated(&mut self) {
        if self.waits {
            let message = "canceling the wait for synchronous replication and terminating connection due to \
                           administrator command";
            return self.notice(&SqlError::new("57P01", message).by("SyncRepWaitForLSN"));
        }
        let message = "terminating connection due to administrator command";
        self.error("FATAL", &SqlError::new("57P01", message).by("ProcessInterrupts"));
    }

    fn report(&mut self, tag: u8, severity: &str, error: &SqlError) {
        self.message(tag, |body| {
            let routine = error.routine;
            for (field, value) in
                [(b'S', severity), (b'V', severity), (b'C', error.code), (b'M', &error.message), (b'R', routine)]
            {
                // A pooler names no routine.
                if field == b'R' && value.is_empty() {
                    continue;
                }
                body.push(field);
                text(body, value);
            }
            body.push(0);
        });
    }
}

fn text(body: &mut Vec<u8>, text: &str) {
    body.extend(text.as_bytes());
    body.push(0);
}

fn short(count: usize) -> u16 {
    u16::try_from(count).unwrap_or(u16::MAX)
}
