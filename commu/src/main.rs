//! One process puts values into a queue, and another one gets them out.
//!
//! The tutorial's section 五、进程间通信 (communication between processes), `demo2/commu.py`.
//! Run it with `cargo run -p commu`.

use std::cell::{Ref, RefCell};
use std::io::{self, Read, Write};
use std::mem::ManuallyDrop;
use std::os::unix::net::UnixStream;
use std::panic::{self, AssertUnwindSafe};
use std::time::Duration;
use std::{fmt, thread};

use nix::errno::Errno;
use nix::libc::_exit;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getpid};

// The code that the writing process runs:
fn write(q: &Queue) -> Result<(), Error> {
    println!("Process to write: {}", getpid());
    for value in ["A", "B", "C"] {
        println!("Put {value} to queue...");
        q.put(value)?;
        thread::sleep(Duration::from_secs_f64(rand::random()));
    }
    Ok(())
}

// The code that the reading process runs:
fn read(q: &Queue) -> Result<(), Error> {
    println!("Process to read: {}", getpid());
    loop {
        let value = q.get()?;
        println!("Get {value} from queue.");
    }
}

fn main() -> Result<(), Error> {
    // The parent creates the Queue, and passes it to each child:
    let q = Queue::new()?;
    let pw = Process::new(write, &q);
    let pr = Process::new(read, &q);
    // Start the child pw, to write:
    let pw = pw.start()?;
    // Start the child pr, to read:
    let pr = pr.start()?;
    q.close_read_end(); // unused here; left open, it would hide from pw that pr has died
    // Wait for pw to end:
    pw.join()?;
    q.join()?; // or pr may be terminated before it has got the last value, as it may in Python
    // The process pr is in an endless loop, so it cannot be waited for, only be terminated:
    pr.terminate()
}

// What Python brings along:

/// Stands in for `multiprocessing.Queue`, and for `JoinableQueue` with its `join`.
///
/// Carries texts of any length, in order, to the one process that calls `get`, from processes that
/// `put` one at a time; each of them is the process that made the queue or forked from it. They go
/// through a pipe that is open both ways, as `multiprocessing.Pipe()` is: `join` is answered.
///
/// A process that neither puts nor gets keeps both ends open, so that the others do not learn of
/// each other's end: use a single queue, and let every child use it. If a writer is killed, a part
/// of a value may be left in the queue: it is of no use any more.
struct Queue {
    write_end: RefCell<Option<UnixStream>>,
    read_end: RefCell<Option<UnixStream>>,
}

/// Sent by `join` in place of the length of a value, which is never that large.
const JOIN: [u8; size_of::<usize>()] = usize::MAX.to_ne_bytes();

impl Queue {
    /// Stands in for `Queue()`. Fails if socketpair(2) does, for want of file descriptors say.
    fn new() -> Result<Self, Error> {
        let (write_end, read_end) = UnixStream::pair().map_err(failed("socketpair"))?;
        Ok(Queue {
            write_end: RefCell::new(Some(write_end)),
            read_end: RefCell::new(Some(read_end)),
        })
    }

    /// Stands in for `Queue.put(value)`: returns as soon as the value is in the pipe.
    ///
    /// Closes the read end of this process, so the reader must have been started. Fails if the
    /// reader has ended, or is this process.
    fn put(&self, value: &str) -> Result<(), Error> {
        self.close_read_end(); // unused here; left open, it would hide that the reader has died
        let message = [&value.len().to_ne_bytes(), value.as_bytes()].concat();
        let sent = (&*open(&self.write_end)?).write_all(&message);
        sent.map_err(failed("put into the queue"))
    }

    /// Stands in for `Queue.get(True)`: waits for the next value and takes it.
    ///
    /// Closes the write end of this process, so all writers must have been started. Fails if none
    /// is left, or if this process has closed its read end.
    fn get(&self) -> Result<String, Error> {
        self.write_end.take(); // unused here; left open, it would hold off the end-of-file
        let mut end = &*open(&self.read_end)?;
        let ended = |_| Error("get from the queue: all writers have ended".to_string());
        let mut length = JOIN;
        end.read_exact(&mut length).map_err(ended)?;
        while length == JOIN {
            io::stdout().flush().map_err(failed("flush"))?; // SIGTERM does not, and comes next
            end.write_all(&[0]).map_err(ended)?;
            end.read_exact(&mut length).map_err(ended)?;
        }
        let mut value = vec![0; usize::from_ne_bytes(length)];
        end.read_exact(&mut value).map_err(ended)?;
        String::from_utf8(value).map_err(failed("get from the queue"))
    }

    /// Stands in for `JoinableQueue.join()`: waits until the reader has dealt with every value that
    /// was put, and has called `get` once more.
    ///
    /// No other process may `put` meanwhile. Closes the read end of this process. Fails if the
    /// reader has ended, or is this process.
    fn join(&self) -> Result<(), Error> {
        self.close_read_end(); // unused here; left open, it would hide that the reader has died
        let mut end = &*open(&self.write_end)?;
        let answered = end.write_all(&JOIN).and_then(|()| end.read_exact(&mut [0]));
        answered.map_err(|_| Error("join the queue: its reader has ended".to_string()))
    }

    /// For a process that never calls `get`, once the one that does has been started.
    fn close_read_end(&self) {
        self.read_end.take();
    }
}

/// The end of a queue's pipe that a call needs; fails if this process has closed it.
fn open(end: &RefCell<Option<UnixStream>>) -> Result<Ref<'_, UnixStream>, Error> {
    Ref::filter_map(end.borrow(), Option::as_ref)
        .map_err(|_| Error("this process has closed that end of the queue".to_string()))
}

/// Stands in for `multiprocessing.Process(target=…, args=(…,))`, before its start.
///
/// [`start`](Process::start) turns it into a [`Child`]: no way to start it twice, or to join it
/// before.
struct Process<A> {
    target: fn(A) -> Result<(), Error>,
    args: A,
}

impl<A> Process<A> {
    /// Takes note of a function and its argument; there is no child before `start`.
    fn new(target: fn(A) -> Result<(), Error>, args: A) -> Self {
        Process { target, args }
    }

    /// Stands in for `Process.start()`: forks a child that runs the target and ends with it.
    ///
    /// The child has its own copy of the parent's memory, and shares its open files. The caller
    /// must see to it, as the compiler does not, that this process has a single thread: a lock that
    /// another one holds would never be released in the child. Fails if standard output cannot be
    /// flushed or fork(2) fails; then there is no child.
    fn start(self) -> Result<Child, Error> {
        io::stdout().flush().map_err(failed("flush"))?; // the child would print what is left, too
        // SAFETY: the caller sees to it that this process has a single thread, so its child may do
        // whatever it may do itself.
        match unsafe { fork() }.map_err(failed("fork"))? {
            ForkResult::Child => bootstrap(|| {
                rand::rng().reseed().map_err(failed("reseed"))?; // or it repeats its parent's
                (self.target)(self.args)
            }),
            ForkResult::Parent { child } => Ok(Child { pid: child }),
        }
    }
}

/// Stands in for a `multiprocessing.Process` after its start.
///
/// One that is dropped is terminated, as Python does with daemonic processes when it exits; a bad
/// end before that shows on stderr.
#[must_use = "only `join` and `terminate` return how it ended"]
struct Child {
    pid: Pid,
}

impl Child {
    /// Stands in for `Process.join()`: waits until the child has ended, and reaps it.
    ///
    /// Fails if the child failed, panicked, died of a signal or exited with a status other than 0.
    fn join(self) -> Result<(), Error> {
        wait(ManuallyDrop::new(self).pid, None) // reaped here, then not in `drop`
    }

    /// Stands in for `Process.terminate()`: ends the child by SIGTERM, and reaps it.
    ///
    /// Fails if the child had come to a bad end before.
    fn terminate(self) -> Result<(), Error> {
        wait(ManuallyDrop::new(self).pid, Some(Signal::SIGTERM)) // reaped here, then not in `drop`
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Err(error) = wait(self.pid, Some(Signal::SIGTERM)) {
            let _ = writeln!(io::stderr(), "Error: {error:?}"); // there is nobody else to tell
        }
    }
}

/// Stands in for `Process._bootstrap()`: runs `run` in a child, and ends the child with status 0 if
/// it returns `Ok`, or else, after showing why, with status 1.
///
/// The child never gets to the code, the destructors and the exit handlers of its parent.
fn bootstrap(run: impl FnOnce() -> Result<(), Error>) -> ! {
    let ended = panic::catch_unwind(AssertUnwindSafe(run));
    let flushed = io::stdout().flush().map_err(failed("flush"));
    let ended = ended.map(|result| result.and(flushed));
    if let Ok(Err(error)) = &ended {
        let _ = writeln!(io::stderr(), "Error: {error:?}"); // if it cannot be shown, status 1 tells
    }
    // SAFETY: `_exit` has no precondition; it ends this process on the spot.
    unsafe { _exit(i32::from(!matches!(ended, Ok(Ok(()))))) }
}

/// Stands in for `os.waitpid(pid, 0)`: waits until the child `pid` has ended, and reaps it. With a
/// `signal`, that is sent first if the child is still alive, as by `os.kill(pid, signal)`.
///
/// Fails, and says how it ended, unless it exited with status 0 or was killed by that signal. If it
/// was just dying of the same signal from elsewhere, there is no telling the two apart.
fn wait(pid: Pid, mut signal: Option<Signal>) -> Result<(), Error> {
    let mut sent = None;
    loop {
        let end = match waitpid(pid, signal.map(|_| WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => {
                // Not reaped yet, so the pid is still its own.
                kill(pid, signal).map_err(failed("kill"))?;
                kill(pid, Signal::SIGCONT).map_err(failed("kill"))?; // or a stopped child stays so
                sent = signal.take();
                continue;
            }
            Ok(WaitStatus::Exited(_, 0)) => return Ok(()),
            Ok(WaitStatus::Signaled(_, by, _)) if Some(by) == sent => return Ok(()),
            Ok(WaitStatus::Exited(_, status)) => format!("exited with status {status}"),
            Ok(WaitStatus::Signaled(_, by, _)) => format!("was killed by {by}"),
            Ok(_) | Err(Errno::EINTR) => continue, // it has not ended yet
            Err(cause) => format!("cannot be waited for: {cause}"),
        };
        return Err(Error(format!("process {pid} {end}")));
    }
}

/// Stands in for an exception that ends the program: what went wrong, in one line.
struct Error(String);

/// `main` shows the error that it returns by `Debug`, so that is the line as it stands.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Makes an [`Error`] of a cause by saying what failed.
fn failed<E: fmt::Display>(what: &str) -> impl FnOnce(E) -> Error {
    move |cause| Error(format!("{what}: {cause}"))
}
